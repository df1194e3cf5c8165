"""Images in: class folders and shards, the ADM crop, a stateless order, the stream of micro-batches, data tools."""
