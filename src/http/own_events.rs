//! What happens to one's own orders, as server-sent events, and the tickets that open them.

use axum::{
    extract::{FromRef, FromRequestParts, State},
    http::{StatusCode, header::AUTHORIZATION, request},
    response::Response,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::{
    HttpState,
    body::{Json, Nothing, Query},
    caller::{Person, actor},
    events::stream,
    limit,
    problem::{Code, Problem},
    routes::{Access, Noted, Routes},
};
use crate::{
    auth::{
        ticket::{LIFETIME, TicketError, Tickets},
        token::Identity,
    },
    realtime::{Desks, Holder, OwnNews},
    store::audit_log::Origin,
};

pub(super) fn routes() -> Routes {
    Routes::new()
        .add(
            Access::Person,
            routes!(follow),
            &[Code::Validation, Code::RateLimited],
        )
        // A page takes one every few minutes.
        .add(Access::Person, routes!(ticket), &[])
        .noting(Noted::Refused)
}

/// How a browser opens the stream.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct StreamQuery {
    /// A ticket, from whoever cannot send a header. Never an access token.
    ticket: Option<String>,
}

/// What opens a stream.
#[derive(Serialize, ToSchema)]
struct TicketView {
    /// Opens one stream of one's own events, at any node. Says nothing by itself.
    #[schema(example = "kq2uBO8vTn6p…")]
    ticket: String,
    /// Seconds until it opens nothing any more.
    #[schema(example = 30)]
    expires_in: u64,
}

/// Who looks: by the token in the header, or by a ticket.
struct Looker(Identity);

impl FromRequestParts<HttpState> for Looker {
    type Rejection = Problem;

    async fn from_request_parts(
        parts: &mut request::Parts,
        state: &HttpState,
    ) -> Result<Self, Problem> {
        let Query(query) = Query::<StreamQuery>::from_request_parts(parts, state).await?;
        let Some(ticket) = query.ticket else {
            let Person(identity) = Person::from_request_parts(parts, state).await?;
            return Ok(Self(identity));
        };
        if parts.headers.contains_key(AUTHORIZATION) {
            let detail = "a ticket is for whoever cannot send `Authorization`: send one of them";
            return Err(Problem::unreadable("#/query/ticket", detail));
        }
        let identity = Tickets::from_ref(state).redeem(&ticket).await?;
        Origin::acts(|| actor(&identity));
        limit::user(&parts.extensions, identity.user)?;
        Ok(Self(identity))
    }
}

/// Follow my orders
///
/// Server-sent events. `snapshot` as soon as the stores have said what there is: my newest orders,
/// which take the place of everything that was told before. Then `order` with each change of one of
/// them, `waitlist` when I join a line, leave it or it is my turn, and at last `end` with the reason.
/// Whoever is slow skips some, but always gets the last one of each order.
///
/// A browser cannot send a header with an `EventSource`: it gets a ticket first. A ticket works once,
/// so whoever lost the connection gets another one; what happened meanwhile is in the `snapshot`.
/// A stream lasts ten minutes at most, and ends a few seconds after its session.
#[utoipa::path(get, path = "/v1/me/events", tag = "orders", params(StreamQuery),
    responses((status = 200, description = "A stream; each `data` is one such object",
        body = OwnNews, content_type = "text/event-stream")))]
async fn follow(Looker(identity): Looker, State(desks): State<Desks>) -> Result<Response, Problem> {
    let Identity { user, session, .. } = identity;
    let events = desks.watch(Holder { user, session })?;
    Ok(stream(events))
}

/// Get a ticket
///
/// It opens one stream, within half a minute. It ends with my session.
#[utoipa::path(post, path = "/v1/me/events/tickets", tag = "orders",
    responses((status = 201, description = "The ticket", body = TicketView)))]
async fn ticket(
    Person(identity): Person,
    State(tickets): State<Tickets>,
    _: Option<Json<Nothing>>,
) -> Result<(StatusCode, axum::Json<TicketView>), Problem> {
    let view = TicketView {
        ticket: tickets.issue(&identity).await?,
        expires_in: LIFETIME.as_secs(),
    };
    Ok((StatusCode::CREATED, axum::Json(view)))
}

impl From<TicketError> for Problem {
    fn from(error: TicketError) -> Self {
        match error {
            TicketError::Invalid => {
                Self::new(Code::Unauthenticated, "A valid access token is required.")
            }
            TicketError::Unavailable => Self::unavailable(
                "No tickets at the moment: the cache Redis does not answer. The stream can be \
                 opened with `Authorization: Bearer`, too.",
            ),
        }
    }
}
