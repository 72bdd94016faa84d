"""From ONNX to TFLite with the codes intact: conversion, the file's own form, run-time switching, cutting widths."""
