"""Video files, cameras and streams: frames in, images out, by way of PyAV."""
