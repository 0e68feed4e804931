"""Rules of other libraries, by what those publish and by what is installed."""
