"""The graph's ends: what an app has in front of a network and behind it, computed on the device as well."""
