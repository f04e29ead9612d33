"""Where text comes from: files, folders, URIs."""
