"""Pictures and videos: decoded, checked, cut into frames as ERNIE 4.5 sees them."""

from pyllamaernie.media.image import Image as Image
from pyllamaernie.media.video import Video as Video
