"""The process: it hangs the edges (socket, CNI) onto the node's services. The only place that knows both."""
