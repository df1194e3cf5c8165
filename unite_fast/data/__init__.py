"""Images in: class-folder trees, the ADM crop, a stateless order, and the stream of micro-batches made of them."""
