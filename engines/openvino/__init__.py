"""OpenVINO on the CPU; the only room that imports openvino."""
