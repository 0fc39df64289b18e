"""Call sites: functional operations of a network, each answered by a module of its own while the user's code runs."""
