//! Images of products: uploaded by operators, shown to everybody.

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{
        HeaderMap, HeaderValue, StatusCode,
        header::{CACHE_CONTROL, CONTENT_TYPE, ETAG},
    },
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{IMAGE_BYTES_MAX, Path, collect},
    caller::Operator,
    problem::{Code, FieldError, Problem},
    routes::{Access, Routes},
    version::{etag, unchanged},
};
use crate::{
    catalogue::{Catalogue, MEDIA_TYPES, Painter, PictureError},
    clock,
    domain::id::ProductId,
    store::{
        images::ImageAdded,
        products::{IMAGES_MAX, Image, Product},
    },
};

/// The route that takes files; every other takes small bodies only.
pub(super) const UPLOAD: &str = "/v1/products/{id}/images";

/// What stands under an address never changes.
const FOR_EVER: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(
            Access::Operator,
            routes!(add),
            &[Code::NotFound, Code::Conflict],
        )
        .add(Access::Operator, routes!(remove), &[Code::NotFound])
        .add(Access::Anyone, routes!(file), &[Code::NotFound])
}

/// An image of a product.
#[derive(Serialize, ToSchema)]
pub(super) struct ImageView {
    id: Uuid,
    /// Pixels of what was uploaded, upright.
    width: u32,
    height: u32,
    /// The sizes that there are, smallest first: up to three.
    renditions: Vec<RenditionView>,
}

/// An image in one size.
#[derive(Serialize, ToSchema)]
struct RenditionView {
    /// Pixels.
    width: u32,
    height: u32,
    #[schema(example = "image/jpeg")]
    media_type: String,
    /// Where it is. What is there never changes.
    #[schema(
        example = "/v1/images/9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08.jpg"
    )]
    url: String,
}

impl From<&Image> for ImageView {
    fn from(image: &Image) -> Self {
        let renditions = image.renditions.iter().map(|rendition| RenditionView {
            width: rendition.width,
            height: rendition.height,
            media_type: rendition.media_type.clone(),
            url: format!(
                "/v1/images/{}.{}",
                rendition.hash,
                extension(&rendition.media_type)
            ),
        });
        Self {
            id: image.id,
            width: image.width,
            height: image.height,
            renditions: renditions.collect(),
        }
    }
}

fn extension(media_type: &str) -> &'static str {
    if media_type == "image/webp" {
        "webp"
    } else {
        "jpg"
    }
}

/// The file itself, as `curl --data-binary @lamp.jpg` sends it.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "it describes a body")]
struct ImageFile(Bytes);

/// Add an image
///
/// Behind the product's others, eight at most. The body is the file: PNG, JPEG or WebP of up to
/// 5 MiB and 25 million pixels. It is turned upright and made in up to three sizes; nothing else
/// of the file is kept. The same file again adds nothing, and answers 200.
#[utoipa::path(post, path = "/v1/products/{id}/images", tag = "images",
    request_body(content((ImageFile = "image/jpeg"), (ImageFile = "image/png"), (ImageFile = "image/webp"))),
    params(("id" = Uuid, Path)),
    responses(
        (status = 201, description = "The image", body = ImageView),
        (status = 200, description = "The product has it already", body = ImageView),
    ))]
async fn add(
    _: Operator,
    State(catalogue): State<Catalogue>,
    State(painter): State<Painter>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let declared = declared(&headers)?;
    let product = ProductId(id);
    // Who asks for nothing that is there need not send megabytes.
    let known = catalogue.by_id(product).await.map_err(reading)?;
    known.ok_or_else(Problem::not_found)?;
    let file = collect(body, IMAGE_BYTES_MAX).await?;
    let image = painter.paint(clock::new_id(), file, declared).await?;
    let added = catalogue.add_image(product, image, clock::now()).await?;
    let (status, image) = match added {
        ImageAdded::New(image) => (StatusCode::CREATED, image),
        ImageAdded::There(image) => (StatusCode::OK, image),
        ImageAdded::Full => {
            let detail = format!("A product has at most {IMAGES_MAX} images: remove one first.");
            return Err(Problem::new(Code::Conflict, detail));
        }
        ImageAdded::Missing => return Err(Problem::not_found()),
    };
    let product: Option<Product> = catalogue.by_id(product).await?;
    let view = product.and_then(|product| {
        let view = product.images.iter().find(|known| known.id == image)?;
        Some((etag(product.version), ImageView::from(view)))
    });
    // Somebody else may have removed it at once.
    let (etag, view) = view.ok_or_else(Problem::not_found)?;
    Ok((status, [(ETAG, etag)], axum::Json(view)).into_response())
}

fn reading(error: crate::store::StoreError) -> Problem {
    Problem::from(error).of_reading()
}

/// The type that the body is declared as, if it is one that is taken.
fn declared(headers: &HeaderMap) -> Result<&'static str, Problem> {
    let value = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let essence = value.split(';').next().unwrap_or("").trim();
    let known = MEDIA_TYPES
        .iter()
        .find(|known| essence.eq_ignore_ascii_case(known));
    known.copied().ok_or_else(|| {
        let detail = "Declare the file as what it is, such as `Content-Type: image/jpeg`.";
        Problem::new(Code::UnsupportedMediaType, detail)
    })
}

impl From<PictureError> for Problem {
    fn from(error: PictureError) -> Self {
        match error {
            PictureError::Busy => {
                Self::unavailable("As many images are being made as this node can.")
            }
            error => Self::out_of_range(vec![FieldError::new("#", error.to_string())]),
        }
    }
}

/// Remove an image
///
/// Its addresses answer 404 within a second; who has it keeps it.
#[utoipa::path(delete, path = "/v1/products/{id}/images/{image}", tag = "images",
    params(("id" = Uuid, Path), ("image" = Uuid, Path)),
    responses((status = 204, description = "It is gone")))]
async fn remove(
    _: Operator,
    State(catalogue): State<Catalogue>,
    Path((id, image)): Path<(Uuid, Uuid)>,
) -> Result<StatusCode, Problem> {
    let removed = catalogue.remove_image(ProductId(id), image, clock::now());
    if removed.await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(Problem::not_found())
    }
}

/// Get an image
///
/// In one size, by the address that its product gives. What is there never changes.
#[utoipa::path(get, path = "/v1/images/{file}", tag = "images",
    params(("file" = String, Path, description = "SHA-256 of the bytes, and `.jpg` or `.webp`")),
    responses(
        (status = 200, description = "The image",
            content((ImageFile = "image/jpeg"), (ImageFile = "image/webp"))),
        (status = 304, description = "The client has it already"),
    ))]
async fn file(
    State(catalogue): State<Catalogue>,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (hash, wanted) = name.split_once('.').ok_or_else(Problem::not_found)?;
    let bytes = digest(hash).ok_or_else(Problem::not_found)?;
    let file = catalogue
        .file(bytes)
        .await?
        .ok_or_else(Problem::not_found)?;
    if extension(&file.media_type) != wanted {
        return Err(Problem::not_found());
    }
    // Hexadecimal digits are always a header's value.
    let etag = HeaderValue::try_from(format!("\"{hash}\"")).map_err(Problem::internal)?;
    let headers_out = [(ETAG, etag.clone()), (CACHE_CONTROL, FOR_EVER)];
    if unchanged(&headers, &etag) {
        return Ok((StatusCode::NOT_MODIFIED, headers_out).into_response());
    }
    let media_type = HeaderValue::try_from(&file.media_type).map_err(Problem::internal)?;
    let body = file.bytes.clone();
    Ok((headers_out, [(CONTENT_TYPE, media_type)], body).into_response())
}

/// Reads 64 hexadecimal digits, small ones only: an address has one way to be written.
fn digest(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    let small = |digit: &u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    if digits.len() != 64 || !digits.iter().all(small) {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, pair) in hash.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(hash)
}
