//! `s3://bucket/prefix`: Amazon's store and every server that speaks like it, set by `AWS_*`.

use std::collections::BTreeMap;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::ClientConfigKey;

use super::{Backend, Place, Service as _};

pub(super) fn open(place: Place, options: &BTreeMap<String, String>) -> Result<Backend, String> {
    let builder = AmazonS3Builder::from_env()
        .with_bucket_name(&place.bucket)
        .with_options(options)?;
    let allow_http = AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp);
    let plain_http = endpoint(&builder).is_some_and(|endpoint| endpoint.starts_with("http://"));
    if plain_http && builder.get_config_value(&allow_http).as_deref() != Some("true") {
        return Err(
            "AWS_ENDPOINT_URL is plain http://, which needs AWS_ALLOW_HTTP=true".to_owned(),
        );
    }
    let suspicion = (!has_credentials(&builder)).then_some(
        "neither AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY nor another source of credentials is set",
    );
    place.backend(&builder, plain_http, suspicion)
}

/// Whether anything but the metadata service of a cloud machine could give credentials.
fn has_credentials(builder: &AmazonS3Builder) -> bool {
    [
        AmazonS3ConfigKey::AccessKeyId,
        AmazonS3ConfigKey::WebIdentityTokenFile,
        AmazonS3ConfigKey::ContainerCredentialsRelativeUri,
        AmazonS3ConfigKey::ContainerCredentialsFullUri,
    ]
    .iter()
    .any(|key| builder.get_config_value(key).is_some())
        || builder
            .get_config_value(&AmazonS3ConfigKey::SkipSignature)
            .as_deref()
            == Some("true")
}

fn endpoint(builder: &AmazonS3Builder) -> Option<String> {
    let value = |key| builder.get_config_value(&key);
    value(AmazonS3ConfigKey::S3Endpoint).or_else(|| value(AmazonS3ConfigKey::Endpoint))
}
