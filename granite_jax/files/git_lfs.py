"""Git LFS pointers: the small text files that a clone without Git LFS has in place of large ones."""

PROBLEM = "is a Git LFS pointer: the file itself is not here (git lfs pull)"
HEAD = 64
"""Bytes of a file by which a pointer is recognized."""


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins with `head` is one (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
    return head.startswith(b"version https://git-lfs.github.com/spec/")
