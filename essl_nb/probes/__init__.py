"""What frozen encoders know: probes, heads, scores with intervals. The registry of probes imports its modules when it is first asked."""
