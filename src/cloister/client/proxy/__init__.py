"""``cloister proxy``: a local endpoint for clients that know nothing of Cloister, over REST and gRPC."""
