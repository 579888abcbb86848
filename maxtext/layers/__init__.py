"""The parts of a decoder, each built from its spec."""
