"""How many GPUs a load needs: measured runs, a model of one engine that is fitted to them, and fleets of such engines."""
