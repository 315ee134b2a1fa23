"""Probes, costs and intervals. The registry of probes imports its three modules when it is first asked."""
