"""Oblivious HTTP: HPKE (RFC 9180), binary HTTP (RFC 9292) and encapsulation (RFC 9458).

`kdf`, `kem` and `hpke` are the cryptography; `keyconfig` names a service's keys and the suites that may
travel; `bhttp` and `fields` are the message inside, `encapsulation` the envelope around it; `reader` takes
bytes apart.
"""
