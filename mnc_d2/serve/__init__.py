"""The page of ``mnc serve``. It needs Flask, which the extra "serve" brings; no other room needs this one."""

from .app import create_app

__all__ = ["create_app"]
