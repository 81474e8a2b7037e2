"""What only stagevar-eval needs: folders of images, user studies."""
