"""RWKV versions, each written once against one vocabulary of operations."""
