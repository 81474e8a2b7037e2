"""What stagevar-eval alone needs: folders of images, user studies."""
