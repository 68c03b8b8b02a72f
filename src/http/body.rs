//! What a request says: its body, its query, its path, each read once and refused in one way.

use std::{error::Error, fmt, marker::PhantomData, time::Duration};

use axum::{
    body::{Body, HttpBody},
    extract::{FromRequest, FromRequestParts, OptionalFromRequest, Request},
    http::{HeaderMap, header::CONTENT_TYPE, request},
};
use futures::StreamExt;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_path_to_error::{Path as ErrorPath, Segment};

use super::problem::{Code, Problem};

/// The largest body, in bytes: no request of this API needs a tenth of it.
pub(super) const BODY_BYTES_MAX: usize = 16 * 1024;

/// How long the body of a request may take to arrive, an image's apart. It is shorter than any
/// request may take, so that whoever is too slow learns for sure that nothing was done.
const ARRIVAL: Duration = Duration::from_millis(2_500);

/// A JSON body.
///
/// 413 when it is too large, 415 when it is not declared as JSON, 400 when it cannot be read.
pub(super) struct Json<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        optional(request)
            .await?
            .map(Self)
            .ok_or_else(|| Problem::unreadable("#", "a JSON body is required"))
    }
}

/// The largest event of a gateway, in bytes: a payment has a few thousand.
pub(super) const EVENT_BYTES_MAX: usize = 256 * 1024;

/// A body byte by byte, as it was signed.
pub(super) struct Raw(pub(super) axum::body::Bytes);

impl<S: Sync> FromRequest<S> for Raw {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        let bytes = axum::body::to_bytes(request.into_body(), EVENT_BYTES_MAX);
        let bytes = in_time(bytes).await?;
        bytes.map(Self).map_err(|_| {
            let detail = "The body is larger than 256 KiB, or ended early.";
            Problem::new(Code::PayloadTooLarge, detail)
        })
    }
}

/// The same, but nothing instead of a body is as good.
impl<S: Sync, T: DeserializeOwned> OptionalFromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Option<Self>, Problem> {
        Ok(optional(request).await?.map(Self))
    }
}

/// The body of a request that says everything by its address: none, or `{}`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

async fn optional<T: DeserializeOwned>(request: Request) -> Result<Option<T>, Problem> {
    let (parts, body) = request.into_parts();
    let bytes = in_time(collect(body, BODY_BYTES_MAX)).await??;
    if bytes.is_empty() {
        return Ok(None);
    }
    if !declares_json(&parts.headers) {
        return Err(super::problem::bare(
            axum::http::StatusCode::UNSUPPORTED_MEDIA_TYPE,
        ));
    }
    read(&bytes).map(Some)
}

/// What arrives in time.
async fn in_time<T>(arriving: impl Future<Output = T>) -> Result<T, Problem> {
    let arrived = tokio::time::timeout(ARRIVAL, arriving).await;
    arrived.map_err(|_| Problem::new(Code::RequestTimeout, "The body did not arrive in time."))
}

/// The largest image, in bytes.
pub(super) const IMAGE_BYTES_MAX: usize = 5 * 1024 * 1024;

/// The bytes of a body of at most so many.
pub(super) async fn collect(body: Body, most: usize) -> Result<Vec<u8>, Problem> {
    let too_large = || too_large(most);
    let expected = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if expected > most {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(expected);
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| Problem::unreadable("#", "the body ended early"))?;
        if bytes.len() + chunk.len() > most {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The refusal of a body of more bytes than these.
pub(super) fn too_large(most: usize) -> Problem {
    let detail = format!("The body is larger than {} KiB.", most / 1024);
    Problem::new(Code::PayloadTooLarge, detail)
}

/// `application/json` or `application/…+json`, with or without parameters.
fn declares_json(headers: &HeaderMap) -> bool {
    let declared = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    // What almost everybody says.
    if declared == "application/json" {
        return true;
    }
    let essence = declared
        .split(';')
        .next()
        .unwrap_or("")
        .trim()
        .to_ascii_lowercase();
    essence == "application/json"
        || (essence.starts_with("application/") && essence.ends_with("+json"))
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    // Only a body that is wrong pays for finding out where.
    let read = serde_json::from_slice::<Object<T>>(bytes);
    read.map(|Object(value)| value).map_err(|error| {
        let deserializer = &mut serde_json::Deserializer::from_slice(bytes);
        match serde_path_to_error::deserialize::<_, Object<T>>(deserializer) {
            Err(located) => refuse("#", located.path(), &located.inner().to_string()),
            // The value is right, so something is behind it.
            Ok(_) => Problem::unreadable("#", error.to_string()),
        }
    })
}

/// What is written as a JSON object, and only that: by itself a derived struct also takes an array
/// of its members, and `[1]` would buy.
#[derive(Clone, Debug)]
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(members)).map(Object)
            }
        }

        deserializer.deserialize_map(Members(PhantomData))
    }
}

/// The query, with its own words for what it may contain.
pub(super) struct Query<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, _state: &S) -> Result<Self, Problem> {
        type Located = serde_path_to_error::Error<serde::de::value::Error>;
        let refused = match axum::extract::Query::try_from_uri(&parts.uri) {
            Ok(axum::extract::Query(query)) => {
                // PostgreSQL cannot hold it, and nothing that is there has it.
                let mut members = parts.uri.query().unwrap_or_default().split('&');
                return match members.find(|member| member.contains("%00")) {
                    Some(member) => {
                        let name = member.split('=').next().unwrap_or_default();
                        let pointer = format!("#/query/{}", escape(name));
                        Err(Problem::unreadable(pointer, "must not contain NUL"))
                    }
                    None => Ok(Self(query)),
                };
            }
            Err(refused) => refused,
        };
        let mut source: Option<&(dyn Error + 'static)> = Some(&refused);
        while let Some(error) = source {
            if let Some(located) = error.downcast_ref::<Located>() {
                return Err(refuse(
                    "#/query",
                    located.path(),
                    &located.inner().to_string(),
                ));
            }
            source = error.source();
        }
        Err(Problem::unreadable("#/query", refused.body_text()))
    }
}

/// What stands in the path. What is no id names nothing, so it is not found.
pub(super) struct Path<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, state: &S) -> Result<Self, Problem> {
        match axum::extract::Path::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(path)) => Ok(Self(path)),
            Err(_) => Err(Problem::not_found()),
        }
    }
}

/// A problem that points to where reading stopped; a missing member is pointed to as if it were
/// there.
fn refuse(root: &str, path: &ErrorPath, message: &str) -> Problem {
    let mut pointer = root.to_owned();
    for segment in path {
        let name = match segment {
            Segment::Seq { index } => index.to_string(),
            Segment::Map { key: name } | Segment::Enum { variant: name } => escape(name),
            // A key that could not be read: the place before it is the last that is known.
            Segment::Unknown => break,
        };
        pointer.push('/');
        pointer.push_str(&name);
    }
    let missing = message
        .strip_prefix("missing field `")
        .and_then(|rest| rest.split('`').next());
    if let Some(name) = missing {
        pointer.push('/');
        pointer.push_str(&escape(name));
    }
    Problem::unreadable(pointer, message)
}

/// RFC 6901.
fn escape(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        http::{Method, StatusCode},
        routing::{get, post},
    };
    use serde::Deserialize;
    use uuid::Uuid;

    use super::{
        super::{
            check::Check,
            tests::{Answer, edged},
        },
        *,
    };

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Purchase {
        quantity: i64,
        #[serde(default, rename = "note")]
        _note: Option<Vec<String>>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct List {
        limit: Option<i64>,
    }

    fn app() -> Router {
        edged(
            Router::new()
                .route(
                    "/orders",
                    post(async |Json(purchase): Json<Purchase>| {
                        let mut check = Check::new();
                        let quantity = check.units("#/quantity", purchase.quantity, 1..=1_000_000);
                        check.done().map(|()| quantity.to_string())
                    }),
                )
                .route(
                    "/list",
                    get(async |Query(list): Query<List>| list.limit.unwrap_or(20).to_string()),
                )
                .route(
                    "/orders/{id}",
                    get(async |Path(id): Path<Uuid>| id.to_string()),
                ),
        )
    }

    async fn send(body: impl Into<Body>, content_type: &str) -> Answer {
        let request = Request::post("/orders").header(CONTENT_TYPE, content_type);
        Answer::of(app(), request.body(body.into()).unwrap()).await
    }

    #[tokio::test]
    async fn every_bad_body_is_refused_at_its_place() {
        let (unreadable, range) = (StatusCode::BAD_REQUEST, StatusCode::UNPROCESSABLE_ENTITY);
        for (body, status, pointer) in [
            (r#"{"quantity": 0}"#, range, "#/quantity"),
            (r#"{"quantity": -1}"#, range, "#/quantity"),
            (r#"{"quantity": 1000000000}"#, range, "#/quantity"),
            (r#"{"quantity": 9223372036854775807}"#, range, "#/quantity"),
            (
                r#"{"quantity": 9223372036854775808}"#,
                unreadable,
                "#/quantity",
            ),
            (r#"{"quantity": 1.5}"#, unreadable, "#/quantity"),
            (r#"{"quantity": 1.0}"#, unreadable, "#/quantity"),
            (r#"{"quantity": "1"}"#, unreadable, "#/quantity"),
            (r#"{"quantity": null}"#, unreadable, "#/quantity"),
            (r#"{"quantity": [1]}"#, unreadable, "#/quantity"),
            (r#"{"quantity": 1, "quantity": 1}"#, unreadable, "#"),
            (r#"{"quantity": 1, "price": 0}"#, unreadable, "#/price"),
            (r#"{"quantity": 1, "a/b~": 0}"#, unreadable, "#/a~1b~0"),
            (
                r#"{"quantity": 1, "note": ["a", 2]}"#,
                unreadable,
                "#/note/1",
            ),
            ("{}", unreadable, "#/quantity"),
            ("[]", unreadable, "#"),
            ("[1]", unreadable, "#"),
            ("1", unreadable, "#"),
            ("null", unreadable, "#"),
            ("", unreadable, "#"),
            ("{", unreadable, "#"),
            ("quantity=1", unreadable, "#"),
            (r#"{"quantity": 1} {}"#, unreadable, "#"),
            ("\u{feff}{}", unreadable, "#"),
            (&"[".repeat(9000), unreadable, "#"),
        ] {
            let answer = send(body.to_owned(), "application/json").await;
            answer.is_problem(status, Code::Validation);
            let found = answer.body["errors"][0]["pointer"]
                .as_str()
                .unwrap()
                .to_owned();
            // Syntax has no better place than the last one that was read.
            assert!(
                found == pointer || (pointer == "#" && found.starts_with('#')),
                "{body}: {found}"
            );
        }
        let answer = send(vec![0xff, 0xfe], "application/json").await;
        answer.is_problem(unreadable, Code::Validation);
    }

    #[tokio::test]
    async fn only_declared_json_of_a_modest_size_is_read() {
        let good = r#"{"quantity": 3}"#;
        for kind in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "application/x+json",
        ] {
            let answer = send(good, kind).await;
            assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, "3"));
        }
        for kind in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "application/jsonx",
            "",
            "json",
        ] {
            send(good, kind).await.is_problem(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                Code::UnsupportedMediaType,
            );
        }
        let fits = format!("{good}{}", " ".repeat(BODY_BYTES_MAX - good.len()));
        assert_eq!(
            send(fits.clone(), "application/json").await.status,
            StatusCode::OK
        );
        let large = format!("{fits} ");
        send(large.clone(), "application/json")
            .await
            .is_problem(StatusCode::PAYLOAD_TOO_LARGE, Code::PayloadTooLarge);
        // Without Content-Length.
        let chunks = large
            .into_bytes()
            .chunks(1000)
            .map(<[u8]>::to_vec)
            .map(Ok::<_, axum::Error>)
            .collect::<Vec<_>>();
        let streamed = Body::from_stream(futures::stream::iter(chunks));
        send(streamed, "application/json")
            .await
            .is_problem(StatusCode::PAYLOAD_TOO_LARGE, Code::PayloadTooLarge);
    }

    #[tokio::test]
    async fn queries_are_refused_at_their_place_and_paths_are_not_found() {
        let get = async |uri: &str| Answer::get(app(), Method::GET, uri).await;
        assert_eq!(get("/list?limit=7").await.text, "7");
        for (uri, pointer) in [
            ("/list?limit=x", "#/query/limit"),
            ("/list?limit=1.5", "#/query/limit"),
            ("/list?limit=", "#/query/limit"),
            ("/list?limt=1", "#/query/limt"),
        ] {
            let answer = get(uri).await;
            answer.is_problem(StatusCode::BAD_REQUEST, Code::Validation);
            assert_eq!(answer.body["errors"][0]["pointer"], pointer, "{uri}");
        }
        get("/list?limit=1&limit=2")
            .await
            .is_problem(StatusCode::BAD_REQUEST, Code::Validation);
        let id = "0192f0c1-2345-7890-abcd-ef0123456789";
        assert_eq!(get(&format!("/orders/{id}")).await.text, id);
        for bad in [
            "1",
            "%7Bp0%7D",
            "0192f0c1-2345-7890-abcd-ef012345678",
            "%00",
            "%ff",
            "..%2f",
        ] {
            get(&format!("/orders/{bad}"))
                .await
                .is_problem(StatusCode::NOT_FOUND, Code::NotFound);
        }
    }
}
