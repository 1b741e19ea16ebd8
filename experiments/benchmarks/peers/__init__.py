"""The same sparse layer in jmoe and in other libraries, side by side."""
# SPDX-License-Identifier: Apache-2.0
