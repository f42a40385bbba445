"""What was asked for, and what the teacher's folder says. No torch: `--help` and typos answer at
once.
"""
