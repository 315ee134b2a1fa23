"""One mixer a module. The registry (`mixers` in base) imports them all when it is first asked."""
