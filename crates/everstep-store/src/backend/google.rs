//! `gs://bucket/prefix`: Google Cloud Storage, set by `GOOGLE_*`.

use std::collections::BTreeMap;

use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};

use super::{Backend, Place, Service as _};

pub(super) fn open(place: Place, options: &BTreeMap<String, String>) -> Result<Backend, String> {
    let builder = GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(&place.bucket)
        .with_options(options)?;
    let value = |key| builder.get_config_value(&key);
    let plain_http =
        value(GoogleConfigKey::BaseUrl).is_some_and(|endpoint| endpoint.starts_with("http://"));
    let has_credentials = value(GoogleConfigKey::SkipSignature).as_deref() == Some("true")
        || [
            GoogleConfigKey::ServiceAccount,
            GoogleConfigKey::ServiceAccountKey,
            GoogleConfigKey::ApplicationCredentials,
            GoogleConfigKey::BearerToken,
        ]
        .into_iter()
        .any(|key| value(key).is_some());
    let suspicion = (!has_credentials).then_some(
        "neither GOOGLE_APPLICATION_CREDENTIALS nor another source of credentials is set",
    );
    place.backend(&builder, plain_http, suspicion)
}
