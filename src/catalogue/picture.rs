//! What becomes of an uploaded file: its pixels, upright, in some sizes, and nothing else of it.

use std::{
    io::Cursor,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use image::{
    DynamicImage, ImageDecoder, ImageEncoder, ImageFormat, ImageReader, Limits,
    codecs::{jpeg::JpegEncoder, webp::WebPEncoder},
    imageops::FilterType,
};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::store::images::{NewImage, NewRendition};

/// The widths that an image is made in, in pixels: a list, a card, a page. None is wider than the
/// upload.
const WIDTHS: [u32; 3] = [160, 480, 1_200];

/// Pixels on a side.
const SIDE_MAX: u32 = 10_000;

/// Pixels of an image: 6,000 by 4,000 and a little more. Decoding takes up to nine bytes of each.
const PIXELS_MAX: u64 = 25_000_000;

/// What a decoder may allocate, in bytes.
const MEMORY_MAX: u64 = 256 * 1024 * 1024;

/// Of JPEG, 1 to 100.
const QUALITY: u8 = 82;

/// Uploads that are worked on at a time: the rest of the machine sells.
const WORKERS: usize = 1;

/// Uploads that wait for their turn, five megabytes each.
const QUEUE: usize = 7;

/// The types of files that are taken.
pub const MEDIA_TYPES: [&str; 3] = ["image/jpeg", "image/png", "image/webp"];

/// Why a file became no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    /// It is no PNG, JPEG or WebP.
    #[error("is no PNG, JPEG or WebP image")]
    Unknown,
    /// It says that it is one type, and is another.
    #[error("is {found}, not what Content-Type declares")]
    Lying {
        /// What it is.
        found: &'static str,
    },
    /// It has too many pixels.
    #[error(
        "has {width} x {height} pixels; at most {SIDE_MAX} on a side and {PIXELS_MAX} in all are taken"
    )]
    TooManyPixels {
        /// Pixels, as the file says.
        width: u32,
        /// The same.
        height: u32,
    },
    /// It ends early, or is damaged.
    #[error("cannot be decoded: it ends early or is damaged")]
    Damaged,
    /// Too many uploads wait.
    #[error("too many images are being made")]
    Busy,
}

/// Makes images on a thread that nobody else needs, one at a time.
#[derive(Clone, Debug)]
pub struct Painter {
    /// One permit for each that works or waits.
    places: Arc<Semaphore>,
    /// One permit for each that works.
    workers: Arc<Semaphore>,
}

impl Default for Painter {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(WORKERS + QUEUE)),
            workers: Arc::new(Semaphore::new(WORKERS)),
        }
    }
}

impl Painter {
    /// Makes the image with this id out of a file that is declared as one of [`MEDIA_TYPES`].
    ///
    /// # Errors
    /// [`PictureError`].
    pub async fn paint(
        &self,
        id: Uuid,
        file: Vec<u8>,
        declared: &'static str,
    ) -> Result<NewImage, PictureError> {
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| PictureError::Busy)?;
        let worker = Arc::clone(&self.workers).acquire_owned().await;
        let worker = worker.map_err(|_| PictureError::Busy)?;
        // Both permits go with the work: a client that leaves does not make room before it ends.
        let work = tokio::task::spawn_blocking(move || {
            let _held = (place, worker);
            // A file that makes a decoder panic is no better than one that it refuses.
            catch_unwind(AssertUnwindSafe(|| paint(id, &file, declared)))
        });
        match work.await {
            Ok(Ok(painted)) => painted,
            Ok(Err(_)) | Err(_) => Err(PictureError::Damaged),
        }
    }
}

fn paint(id: Uuid, file: &[u8], declared: &'static str) -> Result<NewImage, PictureError> {
    let (format, found) = match image::guess_format(file) {
        Ok(ImageFormat::Jpeg) => (ImageFormat::Jpeg, "image/jpeg"),
        Ok(ImageFormat::Png) => (ImageFormat::Png, "image/png"),
        Ok(ImageFormat::WebP) => (ImageFormat::WebP, "image/webp"),
        _ => return Err(PictureError::Unknown),
    };
    if found != declared {
        return Err(PictureError::Lying { found });
    }
    let upright = decode(file, format)?;
    let (width, height) = (upright.width(), upright.height());
    let mut widths = WIDTHS.map(|wanted| wanted.min(width)).to_vec();
    widths.dedup();
    let mut renditions = Vec::new();
    // From large to small, each from the one before.
    let mut pixels = upright;
    for &wanted in widths.iter().rev() {
        pixels = shrink(pixels, wanted);
        renditions.push(encode(&pixels)?);
    }
    renditions.reverse();
    Ok(NewImage {
        id,
        source: Sha256::digest(file).into(),
        width,
        height,
        renditions,
    })
}

fn decode(file: &[u8], format: ImageFormat) -> Result<DynamicImage, PictureError> {
    let damaged = |_| PictureError::Damaged;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MEMORY_MAX);
    let mut reader = ImageReader::with_format(Cursor::new(file), format);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(damaged)?;
    // What the head of the file says, before there is a single pixel: a bomb ends here.
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if width.max(height) > SIDE_MAX || pixels > PIXELS_MAX {
        return Err(PictureError::TooManyPixels { width, height });
    }
    if width == 0 || height == 0 || decoder.total_bytes() > MEMORY_MAX {
        return Err(PictureError::Damaged);
    }
    let orientation = decoder.orientation().map_err(damaged)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    image.apply_orientation(orientation);
    // Eight bits, with transparency only if something is transparent.
    let transparent = image.color().has_alpha()
        && match &image {
            DynamicImage::ImageRgba8(image) => image.pixels().any(|pixel| pixel.0[3] < u8::MAX),
            _ => true,
        };
    Ok(if transparent {
        DynamicImage::ImageRgba8(image.into_rgba8())
    } else {
        DynamicImage::ImageRgb8(image.into_rgb8())
    })
}

/// The same picture in this width, which is not more than it has.
fn shrink(image: DynamicImage, width: u32) -> DynamicImage {
    if width == image.width() {
        return image;
    }
    let height = |width: u32| {
        let scaled = u64::from(image.height()) * u64::from(width) / u64::from(image.width());
        u32::try_from(scaled).unwrap_or(SIDE_MAX).max(1)
    };
    let near = width * 2;
    if image.width() > near * 2 {
        // Most of the way cheaply; nobody sees it under the filter that follows.
        let close = image.thumbnail_exact(near, height(near));
        return close.resize_exact(width, height(width), FilterType::Lanczos3);
    }
    image.resize_exact(width, height(width), FilterType::Lanczos3)
}

fn encode(image: &DynamicImage) -> Result<NewRendition, PictureError> {
    let mut bytes = Vec::new();
    let (width, height, color) = (image.width(), image.height(), image.color().into());
    let (media_type, done) = if image.color().has_alpha() {
        let encoder = WebPEncoder::new_lossless(&mut bytes);
        let done = encoder.write_image(image.as_bytes(), width, height, color);
        ("image/webp", done)
    } else {
        let encoder = JpegEncoder::new_with_quality(&mut bytes, QUALITY);
        let done = encoder.write_image(image.as_bytes(), width, height, color);
        ("image/jpeg", done)
    };
    done.map_err(|_| PictureError::Damaged)?;
    Ok(NewRendition {
        width,
        height,
        hash: Sha256::digest(&bytes).into(),
        media_type,
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use image::{Rgb, RgbImage, Rgba, RgbaImage};

    use super::*;

    fn file(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    /// Left half red, right half blue.
    fn halves(width: u32, height: u32) -> DynamicImage {
        DynamicImage::ImageRgb8(RgbImage::from_fn(width, height, |x, _| {
            if x < width / 2 {
                Rgb([255, 0, 0])
            } else {
                Rgb([0, 0, 255])
            }
        }))
    }

    fn painted(file: &[u8], declared: &'static str) -> NewImage {
        paint(Uuid::nil(), file, declared).unwrap()
    }

    #[test]
    fn every_type_becomes_three_sizes_that_are_never_larger_than_the_upload() {
        for (format, declared) in [
            (ImageFormat::Png, "image/png"),
            (ImageFormat::Jpeg, "image/jpeg"),
            (ImageFormat::WebP, "image/webp"),
        ] {
            let image = painted(&file(&halves(1_400, 700), format), declared);
            let sizes: Vec<_> = image
                .renditions
                .iter()
                .map(|r| (r.width, r.height))
                .collect();
            assert_eq!(sizes, [(160, 80), (480, 240), (1_200, 600)], "{declared}");
            assert_eq!((image.width, image.height), (1_400, 700));
            for rendition in &image.renditions {
                assert_eq!(rendition.media_type, "image/jpeg");
                let decoded = image::load_from_memory(&rendition.bytes).unwrap();
                assert_eq!(
                    (decoded.width(), decoded.height()),
                    (rendition.width, rendition.height)
                );
            }
        }
        for (width, widths) in [(300, vec![160, 300]), (160, vec![160]), (1, vec![1])] {
            let image = painted(&file(&halves(width, 2), ImageFormat::Png), "image/png");
            let made: Vec<_> = image.renditions.iter().map(|r| r.width).collect();
            assert_eq!(made, widths);
        }
    }

    #[test]
    fn what_is_transparent_stays_so() {
        let glass = RgbaImage::from_pixel(200, 100, Rgba([0, 255, 0, 7]));
        let image = painted(&file(&glass.into(), ImageFormat::Png), "image/png");
        for rendition in &image.renditions {
            assert_eq!(rendition.media_type, "image/webp");
            let decoded = image::load_from_memory(&rendition.bytes)
                .unwrap()
                .into_rgba8();
            assert_eq!(decoded.get_pixel(3, 3).0[3], 7);
        }
    }

    /// A JPEG with an EXIF segment that says "turn by 90 degrees", and a secret behind it.
    fn turned() -> Vec<u8> {
        let plain = file(&halves(400, 200), ImageFormat::Jpeg);
        let mut exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01".to_vec();
        // Tag 0x0112, SHORT, one value: 6.
        exif.extend_from_slice(b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0");
        exif.extend_from_slice(b"N 52 31 E 13 24");
        let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
        let mut file = plain[..2].to_vec();
        file.extend_from_slice(&[0xFF, 0xE1, length[0], length[1]]);
        file.extend_from_slice(&exif);
        file.extend_from_slice(&plain[2..]);
        file
    }

    #[test]
    fn it_is_turned_upright_and_nothing_of_its_metadata_is_left() {
        let image = painted(&turned(), "image/jpeg");
        assert_eq!((image.width, image.height), (200, 400));
        for rendition in &image.renditions {
            let has = |text: &[u8]| rendition.bytes.windows(text.len()).any(|part| part == text);
            assert!(!has(b"Exif") && !has(b"N 52 31"));
            let decoded = image::load_from_memory(&rendition.bytes)
                .unwrap()
                .into_rgb8();
            // Turned clockwise, the left half is the upper one.
            let (x, y) = (rendition.width / 2, rendition.height / 8);
            let (top, bottom) = (
                decoded.get_pixel(x, y),
                decoded.get_pixel(x, rendition.height - y),
            );
            assert!(top.0[0] > 200 && bottom.0[2] > 200, "{top:?} {bottom:?}");
        }
    }

    #[test]
    fn what_is_no_image_is_refused_before_anything_is_decoded() {
        let refused = |file: &[u8], declared| paint(Uuid::nil(), file, declared).unwrap_err();
        for junk in [
            &b""[..],
            b"<svg/>",
            b"GIF89a\x01\0\x01\0",
            b"%PDF-1.7",
            &[0; 100],
        ] {
            assert_eq!(refused(junk, "image/png"), PictureError::Unknown);
        }
        let png = file(&halves(10, 10), ImageFormat::Png);
        assert_eq!(
            refused(&png, "image/jpeg"),
            PictureError::Lying { found: "image/png" }
        );
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
            let whole = file(&halves(300, 300), format);
            let declared = match format {
                ImageFormat::Png => "image/png",
                ImageFormat::Jpeg => "image/jpeg",
                _ => "image/webp",
            };
            let cut = &whole[..whole.len() / 8];
            assert_eq!(refused(cut, declared), PictureError::Damaged, "{declared}");
        }
    }

    #[test]
    fn a_bomb_is_refused_by_what_its_head_says() {
        // A sound PNG of 10 by 10 whose head claims other dimensions, with a checksum that agrees.
        for (width, height) in [(60_000_u32, 60_000_u32), (10_001, 1), (5_001, 5_001)] {
            let mut png = file(&halves(10, 10), ImageFormat::Png);
            png[16..20].copy_from_slice(&width.to_be_bytes());
            png[20..24].copy_from_slice(&height.to_be_bytes());
            let sum = crc(&png[12..29]);
            png[29..33].copy_from_slice(&sum.to_be_bytes());
            assert_eq!(
                paint(Uuid::nil(), &png, "image/png").unwrap_err(),
                PictureError::TooManyPixels { width, height }
            );
        }
    }

    fn crc(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |sum, byte| {
            (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
                (sum >> 1) ^ (0xEDB8_8320 & (sum & 1).wrapping_neg())
            })
        })
    }
}
