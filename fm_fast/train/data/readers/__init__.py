"""Images and labels as they lie on a disk: a module a form of them, and the files that stand in for memory."""
