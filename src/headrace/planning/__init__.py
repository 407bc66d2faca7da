"""How many GPUs a load needs: a model of one engine, fitted to measured runs, and fleets of such engines."""
