"""What a sweep is, and two ways to do it: here, or as an array job."""
# SPDX-License-Identifier: Apache-2.0
