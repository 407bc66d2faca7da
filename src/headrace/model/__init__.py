"""Models: what a name means, where the weights come from, and how both become a module on a device."""
