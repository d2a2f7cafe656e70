"""What launch/doctor.py checks: this machine, the job, its ranks."""
