"""Folders of runs read again, drawn and put on a page; nothing is trained here."""
# SPDX-License-Identifier: Apache-2.0
