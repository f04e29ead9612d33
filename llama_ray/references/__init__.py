"""Where models are that a reference names outside of this machine's directories: on a hub, in an object store."""
