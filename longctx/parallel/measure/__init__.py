"""Measurements for the cost model: links and kernels, exposed communication, all-reduces."""
