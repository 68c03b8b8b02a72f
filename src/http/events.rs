//! Live stock as server-sent events.

use std::time::Duration;

use axum::{
    Extension,
    extract::State,
    http::{
        HeaderMap, HeaderName, HeaderValue,
        header::{CACHE_CONTROL, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
};
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::Path,
    problem::{Code, Problem},
    routes::{Access, Routes},
    serve::Endless,
};
use crate::{
    domain::id::SaleId,
    realtime::{Events, FrameId, Hub, Stock, WatchError},
    store::StoreError,
};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Tells nginx to pass pieces on as they come.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(Access::Anyone, routes!(sale), &[Code::NotFound])
        .add(Access::Anyone, routes!(all), &[])
}

/// Follow a sale
///
/// Server-sent events: `snapshot` at once, then `state` when round, state, `sold_out` or window
/// changed, and `stock` when only numbers did; at most ten in a second. Whoever is slow skips some, but
/// always gets the last one. Ids order all events of a sale as texts compare.
#[utoipa::path(get, path = "/v1/sales/{id}/events", tag = "sales",
    params(
        ("id" = Uuid, Path, description = "The sale"),
        ("Last-Event-ID" = Option<String>, Header,
            description = "The last id that was seen: the snapshot is not older")),
    responses((status = 200, description = "An endless stream; each `data` is one such object",
        body = Stock, content_type = "text/event-stream")))]
async fn sale(
    State(hub): State<Hub>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let last_seen = headers
        .get(LAST_EVENT_ID)
        .and_then(|value| FrameId::parse(value.to_str().ok()?));
    let events = hub.sale(SaleId(id), last_seen).await?;
    Ok(stream(events))
}

/// Follow all sales that are not closed
///
/// The same events as of one sale: a `snapshot` of each at once and whenever there is a new one.
/// A sale that closes gets a last `state`.
#[utoipa::path(get, path = "/v1/events", tag = "sales",
    responses((status = 200, description = "An endless stream; each `data` is one such object",
        body = Stock, content_type = "text/event-stream")))]
async fn all(State(hub): State<Hub>) -> Result<Response, Problem> {
    let events = hub.all().await?;
    Ok(stream(events))
}

/// The answer that is such a stream.
pub(super) fn stream(events: Events) -> Response {
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (X_ACCEL_BUFFERING, HeaderValue::from_static("no")),
    ];
    (headers, Extension(Endless::new(events))).into_response()
}

impl From<WatchError> for Problem {
    fn from(error: WatchError) -> Self {
        match &error {
            WatchError::NotFound => Self::not_found(),
            WatchError::Store(cause) if matches!(**cause, StoreError::Unexpected(_)) => {
                Self::internal(error)
            }
            WatchError::Engine(_) | WatchError::Store(_) | WatchError::Stale => {
                Self::unavailable("The stock is not known at the moment.").caused_by(error)
            }
            WatchError::Full => Self::unavailable("As many look as this node can serve."),
            WatchError::TooMany => Self::new(
                Code::RateLimited,
                "As many of your streams are open as may be: close one.",
            )
            .after(Duration::from_secs(5)),
            WatchError::Stopping => Self::unavailable("This node is shutting down."),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;
    use crate::engine::EngineError;

    #[test]
    fn nothing_to_see_is_never_a_mistake_of_the_client() {
        for (error, status, code) in [
            (WatchError::NotFound, 404, Code::NotFound),
            (EngineError::Disconnected.into(), 503, Code::Unavailable),
            (
                EngineError::Unknown("late".into()).into(),
                503,
                Code::Unavailable,
            ),
            (WatchError::Stale, 503, Code::Unavailable),
            (WatchError::Full, 503, Code::Unavailable),
            (WatchError::TooMany, 429, Code::RateLimited),
            (WatchError::Stopping, 503, Code::Unavailable),
        ] {
            let problem = Problem::from(error);
            let expected = StatusCode::from_u16(status).unwrap();
            assert_eq!((problem.status(), problem.code()), (expected, code));
        }
    }
}
