"""What a layer keeps between calls: key-value caches and the update log of recurrent states."""
