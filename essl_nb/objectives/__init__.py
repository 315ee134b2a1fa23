"""Self-supervised objectives: what the frames of an encoder should be. The registry imports every module here when it is first asked."""
