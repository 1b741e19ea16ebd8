"""Operations on trained models."""
# SPDX-License-Identifier: Apache-2.0
