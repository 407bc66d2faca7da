"""The same server under several load generators, and how far what they say differs."""
