"""One open connection: its nursery, reader task, send lock and a task per request; its channels; its end."""
