"""Code that several recipes use: command line, settings, target, training, manifests."""
