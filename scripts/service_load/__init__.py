"""The parts of scripts/load_test.py: clients that put load on a running service, and check every answer."""
