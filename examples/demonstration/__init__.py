"""The acts of `examples/demo.py`: each shows one thing of the main job on a real service."""
