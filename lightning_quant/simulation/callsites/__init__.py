"""Call sites: functional operations of a network, each computed by a module of its own while the user's code runs."""
