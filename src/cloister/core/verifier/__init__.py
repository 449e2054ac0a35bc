"""Verification of evidence under pinned trust anchors, and appraisal under a policy (RFC 9334)."""
