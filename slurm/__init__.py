"""From a command line to a job of a cluster: what is asked is checked, frozen, rendered and queued."""
