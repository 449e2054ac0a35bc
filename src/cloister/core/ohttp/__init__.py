"""Oblivious HTTP: HPKE contexts (RFC 9180), binary HTTP (RFC 9292), encapsulation (RFC 9458)."""
