//! `stockade user add`: adds a user without a request, such as the first operator.

use std::io::{self, BufRead, Write};
use std::num::NonZeroUsize;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Subcommand, ValueEnum};
use secrecy::ExposeSecret;
use stockade::auth;
use stockade::auth::accounts::{AccountError, Accounts};
use stockade::auth::barred::Barred;
use stockade::auth::email::Email;
use stockade::auth::password::PasswordHasher;
use stockade::auth::session::Successors;
use stockade::auth::token::{LIFETIME_MAX_SECONDS, Secret, TokenKeys};
use stockade::config::Config;
use stockade::metrics::{IdentityMetrics, PasswordMetrics};
use stockade::store::sessions::Sessions;
use stockade::store::users::Users;
use stockade::store::{Database, DatabaseSettings};

#[derive(Debug, Subcommand)]
pub(crate) enum UserCommand {
    /// Add a user; the password is read from standard input.
    Add {
        /// The e-mail address to log in with.
        #[arg(long)]
        email: String,
        /// What the user may do.
        #[arg(long, value_enum)]
        role: UserRole,
        /// How the user is called.
        #[arg(long, default_value = "Operator")]
        name: String,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum UserRole {
    Buyer,
    Operator,
    Admin,
}

pub(super) fn run(command: &UserCommand, config: &Config) -> anyhow::Result<()> {
    let UserCommand::Add { email, role, name } = command;
    let email = Email::parse(email).context("--email is not an e-mail address")?;
    let role = match role {
        UserRole::Buyer => auth::Role::Buyer,
        UserRole::Operator => auth::Role::Operator,
        UserRole::Admin => auth::Role::Admin,
    };
    let endpoints = super::endpoints(config)?;
    let mut password = String::new();
    io::stdin().lock().read_line(&mut password)?;
    let password = password.trim_end_matches(['\r', '\n']).to_owned();
    auth::password::check(&password).context("the password on standard input is too weak")?;

    // No token is signed here; the parts of an account want a key all the same.
    let secret = auth::session::RefreshToken::random()?.text();
    let keys = [Secret {
        id: "1",
        bytes: secret.as_bytes(),
    }];
    let tokens = Arc::new(TokenKeys::new(&keys, LIFETIME_MAX_SECONDS)?);
    let user = super::block_on(async {
        let url = endpoints.database_url.expose_secret();
        let database = Database::new(url, DatabaseSettings::default())?;
        let sessions = Sessions::new(database.clone());
        let barred = Barred::new(sessions.clone(), IdentityMetrics::default());
        let accounts = Accounts {
            users: Users::new(database),
            sessions,
            barred: Arc::new(barred),
            passwords: PasswordHasher::new(
                config.bcrypt_cost,
                NonZeroUsize::MIN,
                1,
                PasswordMetrics::default(),
            )?,
            tokens,
            successors: Arc::new(Successors::new(secret.as_bytes())?),
        };
        anyhow::Ok(accounts.register(email, name.clone(), password, role).await)
    })?;
    match user {
        Ok(user) => writeln!(io::stdout(), "{} {} {}", user.id, user.role, user.email)?,
        Err(AccountError::EmailTaken) => bail!("a user with this e-mail address exists"),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
