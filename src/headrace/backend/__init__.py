"""The server's backend: a process that holds the model and its lanes, and answers any number of rings."""
