"""Many GPUs with Ray: the service with a replica for each (Ray Serve), and files of prompts (Ray Data)."""
